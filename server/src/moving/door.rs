//! The private socket at which this host's libvirt finds the other's.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    net::{UnixListener, UnixStream},
    time::timeout,
};
use uuid::Uuid;
use xman_common::protocol::{Code, Fault};

use crate::{ROOT, peer::Carrier};

/// How long this host's libvirt may take to come for its connection: it waits up to 30 s for other work on the domain first.
const COME: Duration = Duration::from_secs(60);
/// Where the private sockets are, below the state directory.
const FOLDER: &str = "carry";
/// The longest path of a socket, in bytes (unix(7)).
const MAX_SOCKET: usize = 107;

/// A socket for this host's libvirt alone, and for one connection.
pub(super) struct PrivateDoor {
    place: Place,
    listener: UnixListener,
}

/// A socket's path; the socket goes with it.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl PrivateDoor {
    /// # Errors
    /// `Unavailable` where there can be none.
    pub(super) fn open(state_dir: &Path) -> Result<Self, Fault> {
        let failed = |error: io::Error| {
            Fault::new(
                Code::Unavailable,
                format!(
                    "nothing was begun: no socket for libvirt below the state directory: {error}"
                ),
            )
        };
        let folder = state_dir.join(FOLDER);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(failed)?;
        let name = Uuid::new_v4().simple().to_string();
        let path = folder.join(name.get(..12).unwrap_or_default());
        if path.as_os_str().len() > MAX_SOCKET {
            return Err(Fault::new(
                Code::Unavailable,
                format!(
                    "nothing was begun: the path of a socket below the state directory has more than {MAX_SOCKET} bytes; choose a shorter `state-dir`"
                ),
            ));
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let place = Place(path);
        fs::set_permissions(&place.0, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self { place, listener })
    }

    /// Where libvirt finds it.
    pub(super) fn path(&self) -> PathBuf {
        self.place.0.clone()
    }

    /// Lets libvirt in, once, and carries what it says. Every end closes all there is, so that libvirt sees it and ends the migration.
    pub(super) async fn serve(self, carrier: Carrier) -> Infallible {
        match timeout(COME, self.accept()).await {
            Ok(Ok(stream)) => {
                drop(self);
                if let Err(fault) = carrier.run(stream).await {
                    tracing::warn!("a migration's connection has ended: {fault}");
                }
            }
            Ok(Err(error)) => {
                drop((self, carrier));
                tracing::warn!(%error, "libvirt could not come for its connection");
            }
            Err(_) => {
                drop((self, carrier));
                tracing::warn!("libvirt did not come for its connection");
            }
        }
        std::future::pending().await
    }

    async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            let who = stream.peer_cred()?;
            if who.uid() == ROOT {
                return Ok(stream);
            }
            tracing::warn!(
                uid = who.uid(),
                "somebody else came for libvirt's connection"
            );
        }
    }
}

/// Removes the sockets of an xmand that was killed; nobody listens there.
pub(super) fn sweep(state_dir: &Path) {
    let _ = fs::remove_dir_all(state_dir.join(FOLDER));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_for_libvirt_is_nobody_elses_and_goes_with_its_migration() {
        let state = tempfile::tempdir().unwrap();
        let door = PrivateDoor::open(state.path()).unwrap();
        let path = door.path();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        drop(door);
        assert!(!path.exists());
        let deep = state.path().join("x".repeat(MAX_SOCKET));
        let refused = PrivateDoor::open(&deep).err().unwrap();
        assert!(refused.message.contains("shorter"), "{refused}");
    }
}
