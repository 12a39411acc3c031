"""What training minimizes: one file per loss, chosen by the config group `loss`."""
