"""What every command needs around its work: command line, errors, progress, ranks, being told to stop, files."""
