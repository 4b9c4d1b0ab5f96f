"""What finetune.py and the scripts share: one room, one job; imports go down the list in the README, never up."""
