"""What is replaced in torch while a session is installed. Nobody imports it but the adapter's own door."""
