"""All that mends or extends OpenMMLab: the one room to visit when a toolbox changes.

Nothing else in the package patches the toolboxes or reaches into their private parts,
but for methods that its subclasses of theirs override or call;
``mmcastling.registry`` belongs here too, and stands where MMEngine looks for it. What
each module is for, and when it can go:

==========================  ================================  =======================
module                      what it mends or adds             can go when
==========================  ================================  =======================
``on_import``               the toolboxes learn of us when    never: it holds the two
                            they are imported, before or      halves apart
                            after ``import mmcastling``
``registrations``           registries, inferencers and       toolboxes read entry
                            ``get_model`` find what is ours;  points of packages
                            debug messages, and warnings to
                            torchao, stay off screen;
                            thop and ptflops count our layers;
                            mmpretrain's multimodal part,
                            broken by transformers 5, is out;
                            weights and their averages keep
                            the state of masks
``registry``                what inherits from our configs    MMEngine builds a base
                            is built in our scope, where the  config's parts in its
                            toolbox's names are unknown       toolbox's scope
``model_index``             finds our configs by name         never
``mmcv_ext``, ``mmcv_ops``  mmcv without its compiled ops     wheels of mmcv have
                            cannot be imported                compiled ops
``safe_loading``            MMEngine unpickles whatever a     MMEngine never does
                            checkpoint asks for
``atomic_checkpoint_hook``  a kill while saving leaves half   MMEngine writes whole
                            a checkpoint                      files
``exact_resume_hook``,      a resumed run sees other data     MMEngine restores random
``seeded_data``             and other random numbers          states and data order
``sharded``                 FSDP clips by part of the norm,   ``FSDPStrategy`` does
                            and cannot be resumed             all three right
                            nor told groups of parameters
``cpu_group``               launchers demand a GPU            MMEngine starts gloo
``own_size``                images of a batch see each        mmdet's detectors leave
                            other's padding                   padding out
``coco_eval``               COCO's evaluation is slow         mmdet's own metric runs
                                                              on faster-coco-eval
                            pycocotools cannot read a byte    pycocotools opens files
                            order mark                        as utf-8-sig
==========================  ================================  =======================
"""
