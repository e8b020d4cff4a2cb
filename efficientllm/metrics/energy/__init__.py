"""Energy: readers of the counters that devices have, and the windows they measure."""
