//! Accept loops: one connection's trouble is never another's.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use xman_common::channel;

use crate::{
    Host,
    audit::{Kind, Record},
    door::Crowded,
    session,
};

/// How long an accept loop pauses when the process has no descriptors or memory left.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// How long one who is turned away may take to hear it.
const FAREWELL: Duration = Duration::from_secs(1);

/// Binds every address of the configuration.
pub(crate) async fn bind(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, String> {
    let mut listeners = Vec::with_capacity(addresses.len());
    for address in addresses {
        let listener = TcpListener::bind(address).await.map_err(|error| {
            format!("cannot listen on {address}: {error}; choose another in `listen`")
        })?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// Accepts until the host stops. One connection's trouble is never another's.
pub(crate) async fn run(listener: TcpListener, host: Arc<Host>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = host.stopping.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => admit(stream, peer, &host),
            Err(error) if is_the_peers(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections");
                sleep(EXHAUSTED_PAUSE).await;
            }
        }
    }
}

/// accept(2) reports what happened to a connection before it was taken; that says nothing about the listener.
fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
            | io::ErrorKind::TimedOut
    )
}

fn admit(stream: TcpStream, peer: SocketAddr, host: &Arc<Host>) {
    let address = peer.ip().to_canonical();
    match host.door.enter(address, &host.config.limits) {
        Ok(entrance) => {
            let host = Arc::clone(host);
            let sessions = host.sessions.clone();
            sessions.spawn(async move {
                let session = tokio::spawn(session::run(stream, address, peer.port(), entrance, Arc::clone(&host)));
                if session.await.is_err() {
                    host.audit.note(
                        Record::new(Kind::Closed, format!("the session from {address} ended by a defect of xmand; its log says where"))
                            .with("address", address.to_string()),
                    );
                }
            });
        }
        Err(Crowded) => {
            host.audit.note(
                Record::new(
                    Kind::Refused,
                    format!("connection from {address} refused: no room for one more session"),
                )
                .with("address", address.to_string()),
            );
            tokio::spawn(timeout(FAREWELL, channel::turn_away(stream)));
        }
    }
}
