//! The wish to stop, given once and heard by every call under way.

use tokio::sync::watch;

/// The end of an interruption that is waited for.
#[derive(Clone, Debug)]
pub struct Interrupt(watch::Receiver<bool>);

impl Interrupt {
    /// Returns an interrupt and the sender that raises it with `true`.
    pub fn new() -> (watch::Sender<bool>, Self) {
        let (raise, raised) = watch::channel(false);
        (raise, Self(raised))
    }

    /// Returns an interrupt that nobody can raise.
    pub fn never() -> Self {
        Self::new().1
    }

    /// Returns whether it was raised.
    pub fn is_raised(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once it is raised; never where nobody can raise it.
    pub async fn raised(&self) {
        let mut raised = self.0.clone();
        if raised.wait_for(|raised| *raised).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
