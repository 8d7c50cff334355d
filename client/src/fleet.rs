//! Many hosts at once: none waits for another, and results come in the order of the hosts.

use std::{collections::BTreeMap, ops::ControlFlow};

use futures_util::{StreamExt, stream};

/// Connections open at once: many, so that those who wait for silent hosts do not keep the others waiting, but a process may have 1024
/// descriptors, and up to [`BLOCKING_THREADS`] threads of resolver and Kerberos need some of them.
pub const WIDTH: usize = 512;
/// Threads in which resolver and Kerberos may wait at once.
pub const BLOCKING_THREADS: usize = 128;

/// Works on every item, at most `width` at once, and delivers each result as soon as those of all items before it are delivered.
/// `Break` ends it.
pub async fn each<H, T, W: Future<Output = T>>(
    items: impl IntoIterator<Item = H>,
    width: usize,
    work: impl Fn(H) -> W,
    mut deliver: impl FnMut(T) -> ControlFlow<()>,
) {
    let work = &work;
    let mut results = stream::iter(items.into_iter().enumerate())
        .map(|(at, item)| async move { (at, work(item).await) })
        .buffer_unordered(width.max(1));
    let mut early = BTreeMap::new();
    let mut next = 0;
    while let Some((at, result)) = results.next().await {
        early.insert(at, result);
        while let Some(result) = early.remove(&next) {
            next += 1;
            if deliver(result).is_break() {
                return;
            }
        }
    }
}

/// Works on every item, at most `width` at once, and returns the results in the order of the items.
pub async fn all<H, T, W: Future<Output = T>>(
    items: impl IntoIterator<Item = H>,
    width: usize,
    work: impl Fn(H) -> W,
) -> Vec<T> {
    let mut results = Vec::new();
    each(items, width, work, |result| {
        results.push(result);
        ControlFlow::Continue(())
    })
    .await;
    results
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_slow_delay_nobody_and_the_order_stays() {
        let began = tokio::time::Instant::now();
        let work = |ms: u64| async move {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            ms
        };
        let times = [30_000, 10, 20, 30_000, 5];
        assert_eq!(all(times, 10, work).await, times);
        assert_eq!(began.elapsed().as_secs(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_work_at_once_than_the_width() {
        let began = tokio::time::Instant::now();
        let work = |_| tokio::time::sleep(Duration::from_secs(1));
        all(0..10, 3, work).await;
        assert_eq!(began.elapsed().as_secs(), 4);
    }
}
