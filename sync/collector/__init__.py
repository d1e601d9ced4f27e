"""The fleet's one server, optional: takes devices' signed reports and shows what became of rollouts."""
