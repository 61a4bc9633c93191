"""Other processes of tests: forks, peers that run code on request, and tables that they share."""
