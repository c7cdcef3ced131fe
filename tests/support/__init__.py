"""What tests share: references, small runs, stand-ins for servers."""
