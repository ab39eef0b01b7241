"""Methods beside each other on the same data: a process a run, several seeds, paired intervals, a page of results."""
