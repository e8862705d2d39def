"""The wire messages, generated from proto/cloudexec/_proto/tasks.proto."""
