"""What each GPU sends per token when a layer's units are spread over P GPUs, computed and not measured: a table of
docs/machines.md.

A ring sends 2(P − 1)/P · n numbers per GPU to sum n of them, and (P − 1)/P · n to gather n. So a step of training sends

    ConditionalFFN      (P − 1)/P · (4 D + 3 G + 2 M) numbers: y, ∂L/∂x; logits, ∂L/∂h; ∂L/∂(bottleneck)
    SparseAutoencoder   (P − 1)/P · (4 D + k) + (P − 1) · k numbers: x̂, ∂L/∂x̄; the values of the code; the k largest of
                        every process, to choose from; and (P − 1)/P · 2 k integers of 8 bytes: which latents are open

and per step, of T tokens in all, a rate of each gate (or a count of each latent) of 8 bytes is summed. Data-parallel
training of the same layer sums these too, and its gradients, once per step:

    2 (P − 1)/P · n / T numbers, n the layer's parameters

    python benchmarks/spread_traffic.py
"""

WIDTH, UNITS, BOTTLENECK = 4096, 262_144, 256  # D, N (a gate per unit: G = N), M
LATENTS, OPEN = 1_048_576, 64  # N, k
STEP = 65_536  # T, tokens of a step on all GPUs together
BYTES, INTEGER = 2, 8  # of a number, bfloat16, and of an integer or a rate in double precision


def ffn(processes: int, gates: int) -> float:
    """Return the bytes that each GPU sends per token to train a ConditionalFFN."""
    numbers = (processes - 1) / processes * (4 * WIDTH + 3 * gates + 2 * BOTTLENECK)
    return BYTES * numbers + statistics(processes, gates)


def sae(processes: int) -> float:
    """Return the same for a SparseAutoencoder with "top_k"."""
    share = (processes - 1) / processes
    numbers = share * (4 * WIDTH + OPEN) + (processes - 1) * OPEN
    return BYTES * numbers + share * 2 * OPEN * INTEGER + statistics(processes, LATENTS)


def data_parallel(processes: int, parameters: int, gates: int) -> float:
    """Return the same where every GPU holds the layer, and gradients are summed once per step."""
    gradients = 2 * (processes - 1) / processes * parameters / STEP
    return BYTES * gradients + statistics(processes, gates)


def statistics(processes: int, gates: int) -> float:
    """Return the bytes per token of what is summed once per step for each gate or latent."""
    return 2 * (processes - 1) / processes * INTEGER * gates / STEP


def main() -> None:
    """Print the table."""
    print("| GPUs | FFN, a gate per unit | FFN, a gate per 64 units | FFN, data-parallel | SAE | SAE, data-parallel |")
    print("|---|---|---|---|---|---|")
    for processes in (8, 16, 32, 64):
        sent = (
            ffn(processes, UNITS),
            ffn(processes, UNITS // 64),
            data_parallel(processes, 2 * WIDTH * UNITS, UNITS),
            sae(processes),
            data_parallel(processes, 2 * WIDTH * LATENTS, LATENTS),
        )
        print(f"| {processes} | " + " | ".join(f"{each / 1024:,.0f}" for each in sent) + " |")


if __name__ == "__main__":
    main()
