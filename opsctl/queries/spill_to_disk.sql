-- Sort 4 MB, which leave nothing behind: a server whose disk is full cannot, and it needs no right to write.
SELECT count(*) AS sorted
FROM (
    SELECT repeat('x', 1000) || number AS padded
    FROM generate_series(1, 4000) AS number
    ORDER BY padded
) AS spilled
