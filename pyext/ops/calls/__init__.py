"""How an op is called: by the dispatcher, as a prepared call, as a step of a plan."""
