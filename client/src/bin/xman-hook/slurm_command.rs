//! Slurm's own commands, for what runs beside slurmctld: by absolute path, without a shell, bounded in time and in what they say.

use std::{path::Path, process::Stdio, time::Duration};

use tokio::{io::AsyncReadExt, process::Command, time::timeout};

use crate::config::Slurm;

/// The most that one of them may say, in bytes: the longest queue of the biggest clusters.
const MAX_OUTPUT: u64 = 256 * 1024 * 1024;
/// The most that is kept of its complaints, in bytes.
const MAX_COMPLAINT: u64 = 4096;

/// Runs one of them and returns what it said; only where it ended well, since half a list is worse than none.
pub(crate) async fn run(slurm: &Slurm, program: &Path, words: &[&str]) -> Result<String, String> {
    let name = program.display();
    let mut command = Command::new(program);
    command
        .args(words)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if let Some(conf) = &slurm.conf {
        command.env("SLURM_CONF", conf);
    } else if let Some(conf) = std::env::var_os("SLURM_CONF") {
        command.env("SLURM_CONF", conf);
    }
    let mut child = command
        .spawn()
        .map_err(|error| format!("{name}: {error}"))?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(format!("{name}: it has no output"));
    };
    let (mut said, mut complained) = (Vec::new(), Vec::new());
    let work = async {
        let mut stdout = stdout.take(MAX_OUTPUT + 1);
        let mut stderr = stderr.take(MAX_COMPLAINT);
        let (out, _) = tokio::join!(
            stdout.read_to_end(&mut said),
            stderr.read_to_end(&mut complained)
        );
        out?;
        child.wait().await
    };
    let limit: Duration = slurm.command_timeout;
    let status = match timeout(limit, work).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => return Err(format!("{name}: {error}")),
        Err(_) => return Err(format!("{name}: no answer in {} s", limit.as_secs())),
    };
    if !status.success() {
        let complaint = String::from_utf8_lossy(&complained);
        return Err(format!("{name}: {status}: {}", complaint.trim()));
    }
    if said.len() as u64 > MAX_OUTPUT {
        return Err(format!("{name} says more than {MAX_OUTPUT} bytes"));
    }
    String::from_utf8(said).map_err(|error| format!("{name}: {error}"))
}

/// Runs scontrol.
pub(crate) async fn scontrol(slurm: &Slurm, words: &[&str]) -> Result<(), String> {
    run(slurm, &slurm.scontrol, words).await.map(drop)
}
