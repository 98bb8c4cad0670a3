"""Length buckets."""
class Buckets:
    def pad(self, inputs): return inputs
def buckets_for(trainer): return None
