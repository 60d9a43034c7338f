"""What `pretrain doctor` looks at, one subject per file; every check yields findings and changes nothing."""
