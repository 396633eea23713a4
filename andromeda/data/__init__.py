"""The path from documents to rows of token ids, and the tokenizer.

* `sources`: files, folders, pipes and data sets of the hub as streams of documents, with the help of `folders` (choice
  of files), `decoding` (bytes to text), `readers` (file formats) and `columns` (choice of the column of documents)
* `cleaning`: drops, repairs or refuses documents that are empty or not text
* `pieces`: cuts long documents at positions where a cut changes no token
* `workers`: texts to token ids, in threads or processes
* `packing`: token ids to rows
* `builder`: `DatasetBuilder`, which runs all of these steps
* `cache`: the folders of built data sets
* `packed`: `PackedDataset`, the rows as a data set of torch
* `tokenizer`: `AndromedaTokenizer`
"""
