"""What a launch holds as it runs: registers of lanes, global and shared memory, and the races of their accesses."""
