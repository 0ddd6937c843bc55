"""Who may connect and what a message may ask for: certificates, versions, and the gate of every server."""
