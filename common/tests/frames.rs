//! Frames and prefaces, byte by byte, without Kerberos.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test ends where something is not as it should be"
)]

use std::time::Duration;

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    time::timeout,
};
use xman_common::{
    channel::{self, CALLER_PREFACE, Channel, ChannelError, HOST_PREFACE},
    wire::{Frames, MAX_HANDSHAKE, MAX_SEALED, WireError},
};

/// Nothing here waits for anything but the other end of a pipe in memory.
const SOON: Duration = Duration::from_secs(10);

fn pipe() -> (DuplexStream, Frames<DuplexStream>) {
    let (peer, ours) = duplex(2 * MAX_SEALED);
    (peer, Frames::new(ours))
}

fn framed(content: &[u8]) -> Vec<u8> {
    [
        &u32::try_from(content.len()).unwrap().to_be_bytes(),
        content,
    ]
    .concat()
}

async fn read(frames: &mut Frames<DuplexStream>) -> Result<Option<Vec<u8>>, WireError> {
    let frame = timeout(SOON, frames.read())
        .await
        .expect("the answer to what was sent comes at once")?;
    Ok(frame.map(|frame| frame.to_vec()))
}

#[tokio::test]
async fn a_frame_is_a_big_endian_length_and_that_many_bytes() {
    let (mut peer, mut frames) = pipe();
    frames.feed(Bytes::from_static(b"hello")).await.unwrap();
    frames.feed(Bytes::new()).await.unwrap();
    frames.flush().await.unwrap();
    let mut sent = [0; 13];
    peer.read_exact(&mut sent).await.unwrap();
    assert_eq!(&sent, b"\0\0\0\x05hello\0\0\0\0");
}

#[tokio::test]
async fn frames_arrive_as_they_were_cut_however_the_bytes_trickle() {
    let (mut peer, mut frames) = pipe();
    let bytes = [framed(b"one"), framed(b""), framed(b"three")].concat();
    let writer = tokio::spawn(async move {
        for byte in bytes {
            peer.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
    });
    for expected in [&b"one"[..], b"", b"three"] {
        assert_eq!(read(&mut frames).await.unwrap().unwrap(), expected);
    }
    assert!(read(&mut frames).await.unwrap().is_none());
    writer.await.unwrap();
}

#[tokio::test]
async fn a_connection_that_ends_between_frames_was_closed() {
    let (mut peer, mut frames) = pipe();
    peer.write_all(&framed(b"last")).await.unwrap();
    drop(peer);
    assert_eq!(read(&mut frames).await.unwrap().unwrap(), b"last");
    assert!(read(&mut frames).await.unwrap().is_none());
}

#[tokio::test]
async fn a_connection_that_ends_within_a_frame_is_torn() {
    let whole = framed(b"hello");
    for length in 1..whole.len() {
        let (mut peer, mut frames) = pipe();
        peer.write_all(&whole[..length]).await.unwrap();
        drop(peer);
        let torn = read(&mut frames).await;
        assert!(
            matches!(torn, Err(WireError::Broken(_))),
            "after {length} bytes: {torn:?}"
        );
    }
}

/// The peer stays silent after the length, so whoever waited for the bytes would wait here until the deadline.
#[tokio::test]
async fn a_length_over_the_limit_is_refused_as_soon_as_it_is_read() {
    for length in [u32::MAX, 1 << 31, u32::try_from(MAX_HANDSHAKE).unwrap() + 1] {
        let (mut peer, mut frames) = pipe();
        peer.write_all(&length.to_be_bytes()).await.unwrap();
        assert!(
            matches!(read(&mut frames).await, Err(WireError::TooLarge)),
            "{length}"
        );
    }
}

#[tokio::test]
async fn strangers_get_short_frames_and_known_callers_longer_ones() {
    let (mut peer, mut frames) = pipe();
    peer.write_all(&framed(&vec![7; MAX_HANDSHAKE]))
        .await
        .unwrap();
    assert_eq!(
        read(&mut frames).await.unwrap().unwrap().len(),
        MAX_HANDSHAKE
    );
    frames.admit();
    peer.write_all(&framed(&vec![7; MAX_SEALED])).await.unwrap();
    assert_eq!(read(&mut frames).await.unwrap().unwrap().len(), MAX_SEALED);
    peer.write_all(&u32::try_from(MAX_SEALED + 1).unwrap().to_be_bytes())
        .await
        .unwrap();
    assert!(matches!(read(&mut frames).await, Err(WireError::TooLarge)));
}

#[tokio::test]
async fn a_frame_over_the_limit_is_not_sent() {
    let (mut peer, mut frames) = pipe();
    frames
        .feed(Bytes::from(vec![0; MAX_HANDSHAKE + 1]))
        .await
        .unwrap_err();
    drop(frames);
    let mut sent = Vec::new();
    peer.read_to_end(&mut sent).await.unwrap();
    assert!(sent.is_empty());
}

#[tokio::test]
async fn losing_a_read_in_the_middle_of_a_frame_loses_no_byte() {
    let (mut peer, mut frames) = pipe();
    let whole = framed(b"hello");
    let (first, rest) = whole.split_at(6);
    peer.write_all(first).await.unwrap();
    assert!(
        timeout(Duration::from_millis(20), frames.read())
            .await
            .is_err()
    );
    peer.write_all(rest).await.unwrap();
    assert_eq!(read(&mut frames).await.unwrap().unwrap(), b"hello");
}

/// Answers a caller's preface with `answer` and returns what the caller makes of it.
async fn answered(answer: &[u8]) -> ([u8; CALLER_PREFACE], ChannelError) {
    let (mut host, ours) = duplex(1024);
    let name = "skirit80".parse().unwrap();
    let caller = tokio::spawn(async move { Channel::initiate(ours, &name).await.map(drop) });
    let mut preface = [0; CALLER_PREFACE];
    host.read_exact(&mut preface).await.unwrap();
    host.write_all(answer).await.unwrap();
    drop(host);
    let error = timeout(SOON, caller)
        .await
        .expect("the caller gives up at once")
        .unwrap()
        .unwrap_err();
    (preface, error)
}

fn host_preface(magic: &[u8; 4], version: u16) -> Vec<u8> {
    [&magic[..], &version.to_be_bytes(), &[0; 8]].concat()
}

#[tokio::test]
async fn a_caller_says_its_versions_and_understands_every_answer() {
    let (preface, error) = answered(&host_preface(b"HTTP", 1)).await;
    assert_eq!(&preface, b"XMAN\0\x01\0\x01");
    assert!(matches!(error, ChannelError::NotXman), "{error}");
    for version in [0, 2, 0xfffe] {
        let (_, error) = answered(&host_preface(b"XMAN", version)).await;
        assert!(matches!(error, ChannelError::Version), "{version}: {error}");
    }
    let (_, error) = answered(&host_preface(b"XMAN", 0xffff)).await;
    assert!(matches!(error, ChannelError::NoRoom), "{error}");
    let whole = host_preface(b"XMAN", 1);
    for length in 0..whole.len() {
        let (_, error) = answered(&whole[..length]).await;
        assert!(
            matches!(error, ChannelError::Closed),
            "after {length} bytes: {error}"
        );
    }
}

#[tokio::test]
async fn who_is_turned_away_is_told_so_and_told_the_time() {
    let (mut caller, host) = duplex(1024);
    channel::turn_away(host).await.unwrap();
    let mut answer = Vec::new();
    caller.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer.len(), HOST_PREFACE);
    let (said, clock) = answer.split_at(6);
    assert_eq!(said, b"XMAN\xff\xff");
    let clock = Duration::from_millis(u64::from_be_bytes(clock.try_into().unwrap()));
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert!(
        now.abs_diff(clock) < Duration::from_secs(60),
        "{clock:?} is not {now:?}"
    );
}
