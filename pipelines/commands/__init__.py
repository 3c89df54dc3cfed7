"""What each word behind ``ace`` does: its options and help; the work is in the stage that it calls."""
