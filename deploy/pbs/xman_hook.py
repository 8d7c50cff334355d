"""OpenPBS: tells the host of this node's domain what the MoM does with its jobs.

Install it with `sh install.sh` beside this file. What it calls decides, and says why in the local syslog; here is only what PBS wants to hear.
"""

import subprocess

import pbs

PROGRAM = "/usr/local/sbin/xman-hook"
# The hook's alarm is 30 s; xman-hook's own deadlines are 25 s and less.
LIMIT = 28
# Configuration, keytab or rights of the hook are wrong: an exception makes PBS do what fail_action says.
BROKEN = 78


def subcommands():
    """What PBS calls the events, and xman-hook. Older versions of PBS do not know all."""
    names = {
        "EXECJOB_BEGIN": "begin",
        "EXECJOB_END": "end",
        "EXECJOB_ABORT": "abort",
        "EXECJOB_POSTSUSPEND": "suspend",
        "EXECJOB_PRERESUME": "resume",
    }
    return {
        getattr(pbs, event): subcommand
        for event, subcommand in names.items()
        if hasattr(pbs, event)
    }


def number_of_run(job, subcommand):
    """How often the job was begun: a run that has ended is never begun again."""
    for name in ("run_version", "run_count"):
        value = getattr(job, name, None)
        if value is not None:
            return str(int(value))
    # A MoM that is not told: the second in which it begins; an end names all runs before it. A suspension and its end name the same.
    return "now" if subcommand in ("begin", "end", "abort") else "0"


def arguments(event):
    job = event.job
    subcommand = subcommands()[event.type]
    words = [
        PROGRAM,
        "pbs",
        subcommand,
        "--job=" + str(job.id),
        "--run=" + number_of_run(job, subcommand),
        "--node=" + str(pbs.get_local_nodename()),
    ]
    if job.euser is not None:
        words.append("--user=" + str(job.euser))
    return words


def main():
    event = pbs.event()
    if event.type not in subcommands():
        event.accept()
    words = arguments(event)
    try:
        ended = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=LIMIT,
            close_fds=True,
        )
    except subprocess.TimeoutExpired:
        event.reject("xman-hook did not end in time; its host is silent")
    if ended.returncode == 0:
        event.accept()
    # What it says of itself comes last; before that, of ends that it delivered for others.
    why = ended.stderr.decode("utf-8", "replace").strip().split("\n")[-1][:400]
    if ended.returncode == BROKEN and words[2] == "begin":
        raise RuntimeError(why)
    event.reject(why or "xman-hook ended with %d" % ended.returncode)


main()
