"""The command lines: flags, config files, exit statuses and the processes of a job."""
