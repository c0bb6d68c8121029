"""Features without labels: a student's body learns from a teacher's."""
