"""fal.ai, for models and workflows that do not run here.

A job that runs there has `remote_endpoint`. Its request id is stored before the first poll, so that it goes on after a
restart. fal knows no idempotency, so the hand-over itself is marked first (status `running`, no request id yet): a
server that dies between that mark and the id cannot know whether fal took the job. Such a job is failed and refunded,
never sent twice.

A job that was to run here and that no device holds becomes such a job in one statement, if its `overflow` says how: it
is then queued for fal, and whichever server comes next sends it.
"""
