"""Turn images and conversations into a Parquet dataset with a card, read it back, and upload it.

python hub_scripts/push_dataset.py --data_path chat.json --image_folder images --output_dir my-dataset
python hub_scripts/push_dataset.py --data_path chat.json --image_folder images --repo_id user/my-dataset
"""

from hf_llava_ft.hub.push_dataset import main

if __name__ == "__main__":
    main()
