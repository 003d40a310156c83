"""One model shared between the processes of one host, a GPU each: tensor parallelism."""
