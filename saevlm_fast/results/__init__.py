"""What a command wrote: which command, of what, when and with which settings, and its main numbers."""
