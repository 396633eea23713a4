"""From documents to rows of token ids.

sources     files, folders, pipes, data sets of the hub: streams of documents
  folders     which files of a folder
  decoding    bytes to text
  readers     the formats of files
  columns     which column holds the documents
cleaning    documents that are empty or not text
pieces      long documents, cut where that changes no token
workers     tokenizer processes
packing     token ids to rows
builder     DatasetBuilder: all of the above
packed      PackedDataset: the rows as a data set of torch
cache       folders of built data sets
tokenizer   AndromedaTokenizer
"""
