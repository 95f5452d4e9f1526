"""The sharing policies, one small class each."""
