"""What launch/train.py and launch/plan.py call: composing the options of a run, checking them, building from them."""
