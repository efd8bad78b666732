"""Prune in a PyTorch loop with DistributedDataParallel, one process per device.

Run with `KERAS_BACKEND=torch torchrun --nproc-per-node 2 examples/torch_ddp.py`.
"""

import torch  # before keras: the other order can fail when two frameworks are installed
import torch.distributed as dist

# isort: split
import keras
from quickstart import digits, small_cnn

import keras_taylor


def train_epoch(replica, optimizer, batches):
    """Trains on this worker's share of the data and returns the last loss."""
    for x, y in batches:
        loss = torch.nn.functional.cross_entropy(replica(x, training=True), y)
        optimizer.zero_grad()
        loss.backward()  # DDP averages the gradients and the sums for the scores over the workers
        optimizer.step()
        replica.module.update_scores()  # so all workers have the same scores and prune the same units
    return loss


def average_statistics(model):
    """Averages the statistics of BatchNormalization, which each worker computes from its own data."""
    for variable in model.non_trainable_variables:
        if variable.value.is_floating_point():
            dist.all_reduce(variable.value.data)
            variable.value.data /= dist.get_world_size()


def main(epochs=6):
    dist.init_process_group(
        "gloo"
    )  # on GPUs: "nccl", and everything inside `with keras.device(f"cuda:{rank}")`
    keras.utils.set_random_seed(0)
    x_train, x_test, y_train, y_test = digits()
    data = torch.utils.data.TensorDataset(torch.tensor(x_train), torch.tensor(y_train))
    sampler = torch.utils.data.DistributedSampler(data, seed=0)
    batches = torch.utils.data.DataLoader(data, batch_size=32, sampler=sampler)

    prunable = keras_taylor.PrunableModel(small_cnn())
    replica = torch.nn.parallel.DistributedDataParallel(prunable)
    weights = prunable.trainable_variables[:-1]  # the last variable accumulates the scores
    optimizer = torch.optim.Adam([v.value for v in weights], lr=2e-3)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        loss = train_epoch(replica, optimizer, batches)
        if epoch in (1, 2, 3):
            prunable.prune(0.1 * epoch)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {float(loss):.4f}, {prunable.cost()['params']:,} parameters")

    average_statistics(prunable)
    if dist.get_rank() == 0:
        small = prunable.strip()
        accuracy = float((small.predict(x_test, verbose=0).argmax(1) == y_test).mean())
        print(f"accuracy {accuracy:.2%} with {small.count_params():,} parameters")
        small.save("small.keras")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
