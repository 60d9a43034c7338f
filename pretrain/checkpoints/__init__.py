"""What is saved, when and how it becomes durable, how it is found and loaded again, and what is exported of it."""
