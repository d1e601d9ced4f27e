"""Gets models onto this machine and keeps them whole: the content-addressed store and its sources."""
