"""Fine-tuning of a pruned model whose zeros stay zero. It knows models and plans, and no layout and no kernel."""
