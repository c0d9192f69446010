"""`trivium prove`: any layout held against one rank, tensor by tensor."""
