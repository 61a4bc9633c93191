"""What every benchmark is run by: cases, budgets and timers, roofs, the machine, reports and plots."""
