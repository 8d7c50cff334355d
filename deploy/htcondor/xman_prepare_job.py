#!/usr/bin/python3
"""HTCondor: room for a job before it starts (HOOK_PREPARE_JOB), and none any more when it has ended (HOOK_JOB_EXIT).

The job's ad comes on standard input. Called by the name xman_job_exit it is the other hook. HTCondor 10.0 and newer take HookStatusCode from what the
hook prints: below 300 the job is held, from 300 on it goes back into the queue.
"""

import os
import re
import socket
import subprocess
import sys

PROGRAM = "/usr/local/sbin/xman-hook"
# Longer than xman-hook's own deadlines, and for the exit shorter than HTCondor's 30 s.
LIMITS = {"begin": 90, "end": 25}
# Exit codes of `xman-hook generic` after which another try is no use.
NEVER = {65, 78}
LONGEST_AD = 1 << 20


def attribute(ad, name):
    """The value of an attribute, whose quotes are stripped. What is no plain word is none."""
    found = re.search(r"^%s\s*=\s*\"?([A-Za-z0-9._+$@-]+)\"?\s*$" % name, ad, re.MULTILINE | re.IGNORECASE)
    return found.group(1) if found else None


def main():
    verb = "end" if "exit" in os.path.basename(sys.argv[0]) else "begin"
    ad = sys.stdin.read(LONGEST_AD)
    cluster, process = attribute(ad, "ClusterId"), attribute(ad, "ProcId")
    if cluster is None or process is None:
        sys.exit("the job's ad names no ClusterId and ProcId")
    words = [
        PROGRAM,
        "generic",
        verb,
        "--job=%s.%s" % (cluster, process),
        # HTCondor does not say reliably which start of the job this is: a run is the second in which it began, and an end names all before it.
        "--run=now",
        "--node=" + socket.gethostname(),
    ]
    owner = attribute(ad, "Owner")
    if verb == "begin" and owner:
        words.append("--user=" + owner)
    try:
        code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=LIMITS[verb]).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        code = 69
    if code and verb == "begin":
        print("HookStatusCode = %d" % (200 if code in NEVER else 300 + code))
        print('HookStatusMessage = "xman-hook ended with %d; the local syslog says why"' % code)
    sys.exit(1 if code else 0)


main()
