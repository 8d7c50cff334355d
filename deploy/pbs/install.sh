#!/bin/sh
# Installs xman_hook.py as a hook of OpenPBS; run it as PBS's administrator on the server, and again after a change.
set -eu
cd "$(dirname "$0")"
qmgr -c "list hook xman" >/dev/null 2>&1 || qmgr -c "create hook xman"
qmgr -c "import hook xman application/x-python default xman_hook.py"
qmgr -c 'set hook xman event = "execjob_begin,execjob_end,execjob_abort,execjob_postsuspend,execjob_preresume"'
qmgr -c "set hook xman alarm = 30"
qmgr -c 'set hook xman fail_action = "offline_vnodes"'
qmgr -c "set hook xman enabled = true"
