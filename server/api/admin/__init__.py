"""Routes for admins: users, keys, jobs, the queue, devices and reports."""
