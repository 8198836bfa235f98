"""What sample.py and train.py stand on: checkpoints, devices, the fast path, data, training."""
