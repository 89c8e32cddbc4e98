"""What runs on top of the ops: the commands, and the self-test before a GPU's first use."""
