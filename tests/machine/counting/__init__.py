"""What a launch executes, counted: instructions, memory requests, round trips, programs in flight."""
