"""What `seqzoo bench` measures: how, against whom, and with which goals."""
