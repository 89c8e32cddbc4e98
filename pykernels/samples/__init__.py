"""What the ops are tried and timed on, a module for each of pykernels.ops; read when an op's samples are asked for."""
