"""A forward runs once: its buffers are updated once, however often the tape is split."""

from rule import holds


def test_batch_norm_counts_every_forward_once(tmp_path):
    holds(
        """
        model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            out = model(x)
            print(out.argmax(1).sum().item())
            loss = F.cross_entropy(out, y)
            print(loss.item())
            loss.backward()
            print(loss.item())
            optimizer.step()
        print(model[1].num_batches_tracked.item())
        report(model)
        """,
        tmp_path,
    )


def test_reinforce_reads_actions_before_backward(tmp_path):
    holds(
        """
        import numpy as np

        policy, rng = mlp(), np.random.default_rng(0)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
        for x, y in DATA:
            chosen, rewards = [], []
            for state, right in zip(x[:4], y[:4]):
                probabilities = policy(state).softmax(-1)
                weights = probabilities.detach().numpy()
                action = int(rng.choice(4, p=weights / weights.sum()))
                chosen.append(probabilities[action].log())
                rewards.append(1.0 if action == right else 0.0)
            baseline = sum(rewards) / len(rewards)
            loss = -sum(c * (r - baseline) for c, r in zip(chosen, rewards))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(loss.item(), baseline)
        report(policy)
        """,
        tmp_path,
        says=None,
    )
