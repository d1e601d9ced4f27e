"""What this machine is: processor level, memory, disk and compiler."""
