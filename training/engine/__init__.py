"""What every training loop needs: checkpoints, stages with manifests, progress."""
