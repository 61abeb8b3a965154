"""What other tools wrote: folders and files of packed weights, under the names of ours."""
