-- From which id on the newest pre-keys of each company begin; companies with fewer are not there.
SELECT company_id, number AS floor
FROM (
    SELECT
        company_id,
        key_id::int AS number,
        row_number() OVER (PARTITION BY company_id ORDER BY key_id::int DESC) AS place
    FROM whatsapp_keys
    WHERE
        key_type = 'pre-key'
        AND key_id ~ '^[0-9]{1,8}$'
) AS pre_keys
WHERE place = %(kept)s
